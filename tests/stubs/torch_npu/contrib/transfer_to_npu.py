# SPDX-License-Identifier: Apache-2.0
"""The real one sends ``torch.cuda`` calls to ``torch.npu``; here ``bitcpm_megatron.patches.cpu`` answers them."""
