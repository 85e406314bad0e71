"""The comparison with peers, without a peer: its processes, its arithmetic, its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwenforge.bench import against_peers
from qwenforge.bench.against_peers import Figures, main
from qwenforge.bench.geometries import write_checkpoint
from qwenforge.bench.measured_process import MeasuredProcess
from qwenforge.bench.peer_engines import OURS, Builds, engines, supports_genai
from qwenforge.bench.peers import genai, llama
from qwenforge.bundle import Bundle
from qwenforge.errors import UserError
from qwenforge.runtime import load

WORKER = """
import json, sys
setup = json.loads(input())
if setup["arguments"].get("broken"):
    print(json.dumps({"error": "no such model"})); sys.exit(1)
print(json.dumps({"description": setup["subject"], "vocab_size": 8}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["prompt_tokens"] == 13:
        sys.exit(7)
    times = [0.0, request["prompt_tokens"] / 1000] + [request["prompt_tokens"] / 1000 + i / 100 for i in (1, 2, 3)]
    print(json.dumps({"times": times[: request["new_tokens"] + 1], "peak_rss_bytes": 1 << 40}), flush=True)
"""
COMMAND = [sys.executable, "-c", WORKER]


def test_process_answers_with_times_and_its_own_memory() -> None:
    """What the worker reports is replaced by the kernel's mark: under Linux getrusage inherits the parent's peak."""
    with MeasuredProcess(COMMAND, "fake", {}) as process:
        times, peak = process.run(prompt_tokens=128, new_tokens=4, seed=0)
    assert times == pytest.approx([0.0, 0.128, 0.138, 0.148, 0.158])
    assert (peak < 200 << 20) == Path("/proc/self/status").is_file()


STAND_IN = """
class Model:
    def __init__(self, path): self.path = path
class GeneratorParams:
    def __init__(self, model): self.model = model
    def set_search_options(self, **options): self.options = options
class Generator:
    def __init__(self, model, params): self.left = params.options["max_length"]
    def append_tokens(self, tokens): self.left -= tokens.shape[1]
    def generate_next_token(self):
        assert self.left > 0
        self.left -= 1
"""


def test_worker_of_the_peer_needs_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the peer's environment, here with a stand-in for the package."""
    (tmp_path / "onnxruntime_genai.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with MeasuredProcess([sys.executable, genai.WORKER], "peer", {"model": "x", "vocab_size": 8}) as process:
        times, _ = process.run(prompt_tokens=5, new_tokens=3, seed=0)
    assert len(times) == 4 and times == sorted(times)


def test_engine_that_cannot_be_loaded_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no such model"):
        MeasuredProcess(COMMAND, "fake", {"broken": True})


def test_engine_that_dies_is_named_with_its_exit_code() -> None:
    with (
        MeasuredProcess(COMMAND, "fake", {}) as process,
        pytest.raises(RuntimeError, match="fake ended with exit code 7"),
    ):
        process.run(prompt_tokens=13, new_tokens=4, seed=0)


def test_first_token_and_decoding_are_measured_apart() -> None:
    figures = Figures()
    figures.add(128, [1.0, 1.5, 1.6, 1.7], 5)
    assert figures.ttft_ms == {128: [pytest.approx(500)]}
    assert figures.tokens_per_second == {128: [pytest.approx(10)]}
    assert figures.peak_rss_bytes == 5


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    """A disturbance that meets both engines of a round leaves its ratio alone."""
    ours = Figures({16: [10.0, 40.0, 10.0]}, {16: [20.0, 5.0, 20.0]}, 1)
    theirs = Figures({16: [20.0, 80.0, 40.0]}, {16: [10.0, 2.5, 10.0]}, 2)
    found = against_peers._summary(theirs, ours)["prompt_tokens"]["16"]
    assert found["our_ttft_ratio"] == {"median": 0.5, "low": 0.25, "high": 0.5}
    assert found["our_tokens_per_second_ratio"]["median"] == 2.0
    assert found["our_best_ttft_ratio"] == 0.5 and found["our_best_tokens_per_second_ratio"] == 2.0


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and against_peers.EXAMPLE in capsys.readouterr().out


def test_bad_count_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--work", "unused", "--new-tokens", "1"])
    assert ended.value.code == 2 and "less than 2" in capsys.readouterr().err


def _engine(first: float, rate: float) -> dict[str, object]:
    by_length = {
        "ttft_ms": {"median": first},
        "tokens_per_second": {"median": rate},
        "our_ttft_ratio": {"median": 100 / first},
        "our_tokens_per_second_ratio": {"median": 50 / rate},
    }
    return {"prompt_tokens": {"128": by_length}}


def test_best_peer_is_named_for_each_figure_and_is_none_of_ours() -> None:
    engines = {
        "qwenforge": _engine(100, 50),
        "qwenforge, one graph": _engine(1, 1000),
        "a": _engine(200, 40),
        "b": _engine(400, 80),
    }
    found = against_peers.against_best(engines)["128"]
    assert (found["ttft"]["peer"], found["ttft"]["our_ratio"]["median"]) == ("a", 0.5)
    assert (found["tokens_per_second"]["peer"], found["tokens_per_second"]["our_ratio"]["median"]) == ("b", 0.625)
    assert against_peers.against_best({"qwenforge": _engine(1, 1)}) == {}


def test_unknown_peer_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--work", "unused", "--peers", "vllm"])
    assert ended.value.code == 2 and "vllm is none of genai, llama.cpp" in capsys.readouterr().err


LLAMA_STAND_IN = """
import ctypes
llama_token = ctypes.c_int32
class Params: pass
llama_log_callback = staticmethod(lambda function: function).__func__
def llama_log_set(callback, data): pass
def llama_backend_init(): pass
def llama_model_default_params(): return Params()
def llama_context_default_params(): return Params()
def llama_model_load_from_file(path, params): return 1
def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch == 2
    return 2
def llama_model_get_vocab(model): return 3
def llama_vocab_n_tokens(vocab): return 4
cache, logits = [], (ctypes.c_float * 4)(0, 5, 9, 1)
def llama_get_memory(context): return 0
def llama_memory_clear(memory, data): cache.clear()
def llama_batch_get_one(tokens, count): return list(tokens)
def llama_decode(context, batch):
    # The prompt first, then the likeliest token alone, again and again.
    assert len(batch) == 5 if not cache else batch == [2]
    cache.extend(batch)
    return 0
def llama_get_logits_ith(context, index): return logits
"""


def test_worker_of_llama_cpp_takes_the_likeliest_token_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: a run begins with an empty cache."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA_STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = {"model": "x", "threads": 2, "vocab_size": 4}
    with MeasuredProcess([sys.executable, llama.WORKER], "llama.cpp", arguments) as process:
        for seed in (0, 1):
            times, _ = process.run(prompt_tokens=5, new_tokens=3, seed=seed)
            assert len(times) == 4 and times == sorted(times)


@pytest.mark.parametrize(("bits", "geometry"), [(8, "tiny"), (4, "tiny-moe")])
def test_our_engines_of_a_comparison_are_bundles_that_generate(bits: int, geometry: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", geometry)
    found = engines(bits, Builds(checkpoint, tmp_path, geometry, 2, None, None))
    for start in found.values():
        model = load(start.arguments["bundle"], threads=2)
        answer = model.generate([list(range(30))], max_new_tokens=2, ignore_eos=True)
        assert len(answer.sequences[0].tokens) == 2
        assert start.disk_bytes > 0
    has_prefill = {name: (Path(start.arguments["bundle"]) / "prefill.onnx").is_file() for name, start in found.items()}
    assert [name for name, has in has_prefill.items() if has] == [f"{OURS}, ONNX Runtime's kernels"]
    kernels = {name: Bundle.open(start.arguments["bundle"]).manifest.ort_cpu for name, start in found.items()}
    assert {name for name, record in kernels.items() if record and record.kernels == "onnxruntime"} == {
        f"{OURS}, ONNX Runtime's kernels",
        f"{OURS}, ONNX Runtime's kernels, one graph",
    }


def test_genai_is_left_out_where_it_refuses_the_model() -> None:
    assert supports_genai("0.5b") and not supports_genai("moe-0.7b")
