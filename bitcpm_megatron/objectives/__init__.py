# SPDX-License-Identifier: Apache-2.0
"""Floor 1: the objectives that training minimizes."""
