"""Run a model over many records: in numbered parts, on several actors, resumable after a kill."""
