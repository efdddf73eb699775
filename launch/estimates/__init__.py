# SPDX-License-Identifier: Apache-2.0
"""What a job will be, from its flags alone: the model's shapes, its memory, and its quantizer."""
