# SPDX-License-Identifier: Apache-2.0
"""The real one sends ``torch.cuda`` to ``torch.npu``; here ``bitcpm_megatron.patches.cpu`` answers its calls, and its
tensor types, of which MindSpeed-LLM builds tensors, are the CPU's."""

import torch

for _name in ("ByteTensor", "FloatTensor", "IntTensor", "LongTensor"):
    setattr(torch.cuda, _name, getattr(torch, _name))
