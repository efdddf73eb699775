# SPDX-License-Identifier: Apache-2.0
"""What a model scores on benchmarks and texts, and how much of another model's score that is."""
