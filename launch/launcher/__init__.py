# SPDX-License-Identifier: Apache-2.0
"""Translation of a job file and this node's place in the cluster into a ``torchrun`` command and its environment."""
