# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torch_npu.contrib.transfer_to_npu``, which redirects ``torch.cuda`` to ``torch.npu``.

Here ``bitcpm_megatron.patches.cpu`` answers the calls of ``torch.cuda``. Its tensor types, with which MindSpeed-LLM
makes tensors, are those of the CPU.
"""

import torch

for _name in ("ByteTensor", "FloatTensor", "IntTensor", "LongTensor"):
    setattr(torch.cuda, _name, getattr(torch, _name))
