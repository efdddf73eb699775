# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, asked to stop, or meet a full disk at random moments, and what they leave behind."""
