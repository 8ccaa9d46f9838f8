"""Memory tables beyond one process and one device."""
