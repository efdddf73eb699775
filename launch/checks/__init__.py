# SPDX-License-Identifier: Apache-2.0
"""The checks of the preflight: one module per subject, each with a function that returns findings."""
