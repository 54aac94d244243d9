"""Tables, curves and pages of finished runs, and the published runs themselves."""
