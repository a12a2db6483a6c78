"""Drawn scenes: pictures of shapes and named drawings, and what can truly be said about them."""
