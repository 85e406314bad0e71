// What the library exports: the function that ONNX Runtime calls when it is registered, and the library's version.

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
constexpr OpTable const* kOps[]{&kOpTable<MoeOp>};

constexpr int32_t kMostTypes = 2; // of one type variable
constexpr int32_t kProviderCount = sizeof(kProviders) / sizeof(kProviders[0]);

constexpr bool areSupported() noexcept
{
    for (OpTable const* const op : kOps)
    {
        if (op->spec.typeVariableCount != 1 || op->spec.typeVariables[0].typeCount > kMostTypes)
        {
            return false;
        }
        for (int32_t i = 0; i < op->spec.outputCount; ++i)
        {
            if (op->spec.outputs[i].typeAttribute >= 0 || op->spec.outputs[i].aliases >= 0)
            {
                return false;
            }
        }
    }
    return true;
}

static_assert(areSupported(), "an op has more than one type variable, or an output that shares an input's memory");

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
            for (int32_t i = 0; i < variable.typeCount * kProviderCount; ++i, ++next)
            {
                nvinfer1::DataType const type = variable.types[i / kProviderCount];
                mOps[next].reset(new (std::nothrow) CustomOp(mApi, *op, type, kProviders[i % kProviderCount]));
                if (mOps[next] == nullptr)
                {
                    return mApi.CreateStatus(ORT_FAIL, "no memory for the custom ops of qwenforge");
                }
                if (OrtStatus* const status = mOps[next]->addTo(domain))
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
    std::unique_ptr<CustomOp> mOps[kMostTypes * kProviderCount * sizeof(kOps) / sizeof(kOps[0])];
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
