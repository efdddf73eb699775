// SPDX-License-Identifier: Apache-2.0
// The class with which torch_npu runs a function in the order of its ops. device.cpp implements it.
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
