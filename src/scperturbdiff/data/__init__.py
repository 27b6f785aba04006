"""From AnnData to populations: reading, checking and matching of cells. Knows nothing of networks."""
