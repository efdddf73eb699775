# SPDX-License-Identifier: Apache-2.0
"""A campaign of bad input: every command, every file that it reads, and the API, one mistake at a time."""
