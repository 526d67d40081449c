"""What several tests stand on: the process harness, the tolerance table, tiny models. No test lives here."""
