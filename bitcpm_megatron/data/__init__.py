# SPDX-License-Identifier: Apache-2.0
"""Floor 2: from text to token files; corpora, tokenizers, and the readers and writers of .bin and .idx files."""
