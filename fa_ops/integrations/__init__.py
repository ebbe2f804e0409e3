"""Other libraries' interfaces to the op. Each module imports its library only when it is called."""
