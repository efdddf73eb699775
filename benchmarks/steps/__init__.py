# SPDX-License-Identifier: Apache-2.0
"""What is measured of a training step: layouts, variants, meters and jobs."""
