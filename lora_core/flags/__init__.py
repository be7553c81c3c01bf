"""Command lines: parsing, pages and other instant answers, and the flags of other tools."""
