"""Command lines: options, their help, mistakes as messages, progress."""
