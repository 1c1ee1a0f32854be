"""The paper's claims, repeated: experiments that declare their cells, run once each, and pages out of the results."""
