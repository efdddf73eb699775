# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint or model: numbers for people and for programs."""
