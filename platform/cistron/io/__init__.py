"""Files: where bytes live (local paths and URLs), and the formats of biology."""
