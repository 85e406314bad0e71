// What the library exports: the function that ONNX Runtime calls when it is registered, the library's version, and the
// instruction set that its kernels use.

#include "cpu/instruction_set.h"
#include "cpu/node.h"

#include <mutex>

#define QWENFORGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace qwenforge::cpu
{
namespace
{

constexpr char kDomain[] = "qwenforge.cpu";
constexpr char kProvider[] = "CPUExecutionProvider";

// An op as ONNX Runtime's registry knows it. Nothing that it calls lets an exception out.
class RegisteredOp : private OrtCustomOp
{
public:
    RegisteredOp(OrtApi const& api, OpDefinition definition)
        : OrtCustomOp{}
        , mApi(api)
        , mDefinition(std::move(definition))
    {
        version = kOrtVersion;
        GetName = [](OrtCustomOp const* op) { return of(op).mDefinition.name; };
        GetExecutionProviderType = [](OrtCustomOp const*) { return kProvider; };
        GetInputTypeCount = [](OrtCustomOp const* op) { return of(op).mDefinition.inputs.size(); };
        GetInputType = [](OrtCustomOp const* op, size_t index) { return of(op).mDefinition.inputs[index].type; };
        GetOutputTypeCount = [](OrtCustomOp const* op) { return of(op).mDefinition.outputs.size(); };
        GetOutputType = [](OrtCustomOp const* op, size_t index) { return of(op).mDefinition.outputs[index].type; };
        GetInputCharacteristic = [](OrtCustomOp const* op, size_t index)
        { return characteristic(of(op).mDefinition.inputs[index]); };
        GetOutputCharacteristic = [](OrtCustomOp const* op, size_t index)
        { return characteristic(of(op).mDefinition.outputs[index]); };
        GetInputMemoryType = [](OrtCustomOp const*, size_t) { return OrtMemTypeDefault; };
        GetVariadicInputMinArity = [](OrtCustomOp const*) { return 1; };
        GetVariadicInputHomogeneity = [](OrtCustomOp const*) { return 0; };
        GetVariadicOutputMinArity = [](OrtCustomOp const*) { return 1; };
        GetVariadicOutputHomogeneity = [](OrtCustomOp const*) { return 0; };
        GetStartVersion = [](OrtCustomOp const*) { return 1; };
        GetEndVersion = [](OrtCustomOp const*) { return 1; };
        CreateKernelV2 = create;
        KernelComputeV2 = compute;
        KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
    }

    OrtStatus* addTo(OrtCustomOpDomain* domain) const noexcept
    {
        return mApi.CustomOpDomain_Add(domain, this);
    }

private:
    struct Instance
    {
        OrtApi const& api;
        std::string who; // "QuantizedLinear 'layer 3': "
        std::unique_ptr<Kernel> kernel;
    };

    static RegisteredOp const& of(OrtCustomOp const* op) noexcept
    {
        return *static_cast<RegisteredOp const*>(op);
    }

    static OrtCustomOpInputOutputCharacteristic characteristic(Port const& port) noexcept
    {
        return port.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }

    static OrtStatus* create(OrtCustomOp const* op, OrtApi const* api, OrtKernelInfo const* info, void** kernel) noexcept
    {
        OpDefinition const& definition = of(op).mDefinition;
        std::string who = definition.name;
        try
        {
            Node const node(*api, info);
            who += " '" + node.name() + "': ";
            *kernel = new Instance{*api, who, definition.create(node)};
            return nullptr;
        }
        catch (std::exception const& error)
        {
            return api->CreateStatus(ORT_INVALID_ARGUMENT, (who + error.what()).c_str());
        }
    }

    static OrtStatus* compute(void* kernel, OrtKernelContext* context) noexcept
    {
        Instance const& instance = *static_cast<Instance*>(kernel);
        try
        {
            instance.kernel->compute(Call(instance.api, context));
            return nullptr;
        }
        catch (std::exception const& error)
        {
            return instance.api.CreateStatus(ORT_INVALID_ARGUMENT, (instance.who + error.what()).c_str());
        }
    }

    OrtApi const& mApi;
    OpDefinition mDefinition;
};

// Kept for as long as the library is loaded: sessions hold the addresses of the ops.
class Registration
{
public:
    explicit Registration(OrtApi const& api)
        : mApi(api)
    {
        for (auto const& define : {quantizedLinear, quantizedGatedMlp, quantizedMixtureOfExperts, cachedAttention,
                 cachedAttentionOfHalves})
        {
            mOps.push_back(std::make_unique<RegisteredOp>(api, define()));
        }
    }
    Registration(Registration const&) = delete;
    Registration& operator=(Registration const&) = delete;
    ~Registration()
    {
        if (mDomain != nullptr)
        {
            mApi.ReleaseCustomOpDomain(mDomain);
        }
    }

    bool isOf(OrtApi const& api) const noexcept
    {
        return &api == &mApi;
    }

    OrtStatus* addTo(OrtSessionOptions* options) noexcept
    {
        OrtStatus* const status = mDomain == nullptr ? create() : nullptr;
        return status != nullptr ? status : mApi.AddCustomOpDomain(options, mDomain);
    }

private:
    OrtStatus* create() noexcept
    {
        OrtCustomOpDomain* domain = nullptr;
        if (OrtStatus* const status = mApi.CreateCustomOpDomain(kDomain, &domain))
        {
            return status;
        }
        std::unique_ptr<OrtCustomOpDomain, void (*)(OrtCustomOpDomain*)> owned(domain, mApi.ReleaseCustomOpDomain);
        for (auto const& op : mOps)
        {
            if (OrtStatus* const status = op->addTo(domain))
            {
                return status;
            }
        }
        mDomain = owned.release();
        return nullptr;
    }

    OrtApi const& mApi;
    OrtCustomOpDomain* mDomain{nullptr};
    std::vector<std::unique_ptr<RegisteredOp>> mOps;
};

} // namespace
} // namespace qwenforge::cpu

// Called for each set of session options, from any thread.
QWENFORGE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base)
{
    OrtApi const* const api = base->GetApi(qwenforge::kOrtVersion);
    if (api == nullptr)
    {
        // Version 1 has been served by every release, and its first entry makes the error.
        OrtApi const* const oldest = base->GetApi(1);
        return oldest == nullptr ? nullptr
                                 : oldest->CreateStatus(ORT_FAIL, "qwenforge's custom ops need ONNX Runtime 1.18 or later");
    }
    try
    {
        static std::mutex mutex;
        static qwenforge::cpu::Registration registration(*api);
        std::lock_guard<std::mutex> const lock(mutex);
        return registration.isOf(*api)
            ? registration.addTo(options)
            : api->CreateStatus(ORT_FAIL, "another ONNX Runtime of this process has qwenforge's custom ops already");
    }
    catch (std::exception const& error)
    {
        return api->CreateStatus(ORT_FAIL, error.what());
    }
}

// As in the file VERSION, "1.2.3".
QWENFORGE_EXPORT char const* qwenforgePluginsVersion()
{
    return QWENFORGE_VERSION;
}

// "avx512-vnni", "avx2" or "baseline"; null where the environment asks for one that the kernels refuse.
QWENFORGE_EXPORT char const* qwenforgeCpuInstructionSet()
{
    try
    {
        return qwenforge::cpu::nameOf(qwenforge::cpu::instructionSet());
    }
    catch (std::exception const&)
    {
        return nullptr;
    }
}
