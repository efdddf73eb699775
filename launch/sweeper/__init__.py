# SPDX-License-Identifier: Apache-2.0
"""From a sweep file to its runs, and from what they have logged to one table and one picture."""
