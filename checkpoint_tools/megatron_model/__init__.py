# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of Megatron as one whole model, whatever its layout."""
