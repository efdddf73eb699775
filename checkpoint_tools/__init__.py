# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tools: conversion to and from Hugging Face, fusing of latent weights, packed exports, and inspection."""
