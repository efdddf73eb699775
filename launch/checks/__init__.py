# SPDX-License-Identifier: Apache-2.0
"""What the preflight checks: one module per subject, each a generator of findings."""
