# SPDX-License-Identifier: Apache-2.0
"""What several tests share: small models, launches, doubles of hosts, and processes that are watched."""
