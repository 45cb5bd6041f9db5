"""Which dimensions of which values run over tokens, or over rows and columns."""
