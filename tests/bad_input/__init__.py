# SPDX-License-Identifier: Apache-2.0
"""A campaign of bad input for every command, every file that commands read, and the API, one mistake at a time."""
