// SPDX-License-Identifier: Apache-2.0
// torch_npu's way to run something in the order of its ops; see device.cpp.
#pragma once

#include <functional>
#include <string>

namespace at_npu::native {

class OpCommand {
public:
    OpCommand& Name(const std::string& name);
    OpCommand& SetCustomHandler(std::function<int()> handler);
    void Run();

private:
    std::string name_;
    std::function<int()> handler_;
};

}  // namespace at_npu::native
