// Creation: right fields and every kind of wrong ones.

#pragma once

#include "check.h"
#include "plugin_access.h"

#include <cmath>

inline void checkCreation(Subject const& subject, IPluginCreatorV3One& creator)
{
    char const* const name = subject.spec->name;
    PluginFieldCollection const* const known = creator.getFieldNames();
    bool same = known->nbFields == subject.spec->attributeCount;
    for (int32_t i = 0; same && i < known->nbFields; ++i)
    {
        same = std::strcmp(known->fields[i].name, subject.spec->attributes[i].name) == 0 && known->fields[i].length == 1;
    }
    check(same, "%s: its creator names its fields in order", name);
    for (TensorRTPhase const phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME})
    {
        PluginPointer const plugin = create(creator, Fields(*subject.spec, subject.numbers), phase);
        if (!check(plugin != nullptr, "%s: created in phase %d", name, static_cast<int>(phase)))
        {
            return;
        }
        auto* const core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
        check(std::strcmp(core->getPluginName(), name) == 0 && std::strcmp(core->getPluginVersion(), "1") == 0
                && std::strcmp(core->getPluginNamespace(), kNamespace) == 0,
            "%s: name, version and namespace", name);
        PluginPointer const copy(plugin->clone());
        check(copy != nullptr && copy.get() != plugin.get() && serialized(*copy) == serialized(*plugin),
            "%s: a clone is another object with the same fields", name);
        PluginFieldCollection const* const fields = runtimeOf(*plugin)->getFieldsToSerialize();
        PluginPointer const again(creator.createPlugin("again", fields, TensorRTPhase::kRUNTIME));
        check(again != nullptr && serialized(*again) == serialized(*plugin), "%s: recreated from its own fields", name);
        check(std::strstr(buildOf(*plugin)->getTimingCacheID(), name) != nullptr
                && std::strstr(buildOf(*plugin)->getMetadataString(), subject.spec->attributes[0].name) != nullptr,
            "%s: timing cache and metadata tell its fields", name);
    }
}

inline void checkWrongFields(Subject const& subject, IPluginCreatorV3One& creator, Source const& source)
{
    OpSpec const& spec = *subject.spec;
    Fields const good(spec, subject.numbers);
    auto const refused = [&](Fields const& fields, char const* what, char const* field) {
        bool good = create(creator, fields) == nullptr;
        if (source.logged != nullptr)
        {
            good = good && source.logged->find(field) != std::string::npos;
        }
        check(good, "%s: refused: %s %s: %s", spec.name, field, what, source.logged ? source.logged->c_str() : "");
    };
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        auto const index = static_cast<size_t>(i);
        AttributeSpec const& attribute = spec.attributes[i];
        Fields fields = good;
        fields.fields.erase(fields.fields.begin() + i);
        refused(fields, "is missing", attribute.name);
        fields = good;
        fields.fields.push_back(fields.fields[index]);
        refused(fields, "is given twice", attribute.name);
        fields = good;
        fields.fields[index].type = PluginFieldType::kINT64;
        refused(fields, "is of another type", attribute.name);
        fields = good;
        fields.fields[index].length = 2;
        refused(fields, "holds two values", attribute.name);
        fields = good;
        fields.fields[index].length = 0;
        refused(fields, "holds no value", attribute.name);
        fields = good;
        fields.fields[index].data = nullptr;
        refused(fields, "has no data", attribute.name);
        for (double const number : {attribute.minimum - 1, attribute.maximum + 1})
        {
            if (std::fabs(number) > 1e9)
            {
                continue;
            }
            std::vector<double> numbers = subject.numbers;
            numbers[index] = number;
            refused(Fields(spec, numbers), "is out of range", attribute.name);
        }
        if (attribute.multipleOf > 1)
        {
            std::vector<double> numbers = subject.numbers;
            numbers[index] += 1;
            refused(Fields(spec, numbers), "is no multiple", attribute.name);
        }
        if (attribute.type == AttributeType::kFloat)
        {
            std::vector<double> numbers = subject.numbers;
            numbers[index] = std::nan("");
            refused(Fields(spec, numbers), "is NaN", attribute.name);
        }
    }
    Fields fields = good;
    fields.fields.emplace_back("surprise", &fields.values.back(), PluginFieldType::kINT32, 1);
    refused(fields, "is unknown", "surprise");
    fields.fields.back().name = nullptr;
    refused(fields, "has no name", "without a name");
    check(creator.createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr, "%s: refused: no fields", spec.name);
    PluginFieldCollection empty{};
    empty.nbFields = 3;
    check(creator.createPlugin(nullptr, &empty, TensorRTPhase::kBUILD) == nullptr,
        "%s: refused: three fields at no address", spec.name);
    // What breaks a requirement is refused by its name: a page of tokens that are no power of two.
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        if (std::strcmp(spec.attributes[i].name, "page_size") == 0)
        {
            for (double const number : {8.0, 24.0, 48.0, 4080.0})
            {
                std::vector<double> numbers = subject.numbers;
                numbers[static_cast<size_t>(i)] = number;
                refused(Fields(spec, numbers), "is no power of two", spec.attributes[i].name);
            }
        }
    }
}
