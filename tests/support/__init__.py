# SPDX-License-Identifier: Apache-2.0
"""Shared code of tests: small models, launches, test doubles of hosts, and watched processes."""
