# SPDX-License-Identifier: Apache-2.0
"""From a job file and this node's place in the cluster to a ``torchrun`` command and its environment."""
