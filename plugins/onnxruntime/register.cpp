// What the library exports: the function that ONNX Runtime calls when it is registered, and the library's version.

#include "attention/attention_op.h"
#include "moe/moe_op.h"
#include "onnxruntime/op_schema.h"

#include <memory>
#include <mutex>
#include <new>

#define QWENFORGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace qwenforge
{
namespace
{

// Every op of this library.
constexpr OpTable const* kOps[]{&kOpTable<AttentionOp>, &kOpTable<MoeOp>};

constexpr int32_t kMostTypes = 2;   // of one type variable
constexpr int32_t kMostChoices = 2; // of types that an attribute chooses for the outputs
constexpr int32_t kProviderCount = sizeof(kProviders) / sizeof(kProviders[0]);

// How many values the attribute has that chooses types of outputs, 1 without such an attribute.
constexpr int32_t choicesOf(OpSpec const& spec) noexcept
{
    int32_t const attribute = typeChoosingAttribute(spec);
    return attribute < 0 ? 1 : static_cast<int32_t>(spec.attributes[attribute].maximum) + 1;
}

constexpr bool areAlike(OpSpec const& spec, int32_t first, int32_t second) noexcept
{
    for (int32_t i = 0; i < spec.outputCount; ++i)
    {
        TensorSpec const& output = spec.outputs[i];
        if (output.typeAttribute >= 0
            && (output.types[first].variable != output.types[second].variable
                || output.types[first].type != output.types[second].type))
        {
            return false;
        }
    }
    return true;
}

// Whether no smaller value of the attribute chooses the same types.
constexpr bool isNewChoice(OpSpec const& spec, int32_t choice) noexcept
{
    for (int32_t smaller = 0; smaller < choice; ++smaller)
    {
        if (areAlike(spec, smaller, choice))
        {
            return false;
        }
    }
    return true;
}

constexpr int32_t newChoicesOf(OpSpec const& spec) noexcept
{
    int32_t count = 0;
    for (int32_t choice = 0; choice < choicesOf(spec); ++choice)
    {
        count += isNewChoice(spec, choice) ? 1 : 0;
    }
    return count;
}

constexpr bool areSupported() noexcept
{
    for (OpTable const* const op : kOps)
    {
        if (op->spec.typeVariableCount != 1 || op->spec.typeVariables[0].typeCount > kMostTypes
            || newChoicesOf(op->spec) > kMostChoices)
        {
            return false;
        }
        for (int32_t i = 0; i < op->spec.outputCount; ++i)
        {
            TensorSpec const& output = op->spec.outputs[i];
            bool const another = output.typeAttribute >= 0 && output.typeAttribute != typeChoosingAttribute(op->spec);
            if (another || (output.aliases >= 0 && op->spec.inputs[output.aliases].presentIf != nullptr))
            {
                return false;
            }
        }
    }
    return true;
}

static_assert(areSupported(), "an op has more than one type variable, or several attributes that choose types of its "
                              "outputs, or an output that shares the memory of an optional input");

// Kept for as long as the library is loaded: sessions hold the addresses of the ops.
class Registration
{
public:
    explicit Registration(OrtApi const& api) noexcept
        : mApi(api)
    {
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
        if (OrtStatus* const status = mApi.CreateCustomOpDomain(kOps[0]->spec.pluginNamespace, &domain))
        {
            return status;
        }
        std::unique_ptr<OrtCustomOpDomain, void (*)(OrtCustomOpDomain*)> owned(domain, mApi.ReleaseCustomOpDomain);
        size_t next = 0;
        for (OpTable const* const op : kOps)
        {
            TypeVariableSpec const& variable = op->spec.typeVariables[0];
            for (int32_t i = 0; i < variable.typeCount * choicesOf(op->spec) * kProviderCount; ++i)
            {
                int32_t const choice = i / kProviderCount % choicesOf(op->spec);
                if (!isNewChoice(op->spec, choice))
                {
                    continue;
                }
                nvinfer1::DataType const type = variable.types[i / kProviderCount / choicesOf(op->spec)];
                mOps[next].reset(new (std::nothrow) CustomOp(mApi, *op, type, choice, kProviders[i % kProviderCount]));
                if (mOps[next] == nullptr)
                {
                    return mApi.CreateStatus(ORT_FAIL, "no memory for the custom ops of qwenforge");
                }
                if (OrtStatus* const status = mOps[next++]->addTo(domain))
                {
                    return status;
                }
            }
        }
        mDomain = owned.release();
        return nullptr;
    }

    OrtApi const& mApi;
    OrtCustomOpDomain* mDomain{nullptr};
    std::unique_ptr<CustomOp> mOps[kMostTypes * kMostChoices * kProviderCount * sizeof(kOps) / sizeof(kOps[0])];
};

} // namespace
} // namespace qwenforge

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
    static std::mutex mutex;
    static qwenforge::Registration registration(*api);
    std::lock_guard<std::mutex> const lock(mutex);
    return registration.isOf(*api)
        ? registration.addTo(options)
        : api->CreateStatus(ORT_FAIL, "another ONNX Runtime of this process has qwenforge's custom ops already");
}

// As in the file VERSION, "1.2.3".
QWENFORGE_EXPORT char const* qwenforgePluginsVersion()
{
    return QWENFORGE_VERSION;
}
