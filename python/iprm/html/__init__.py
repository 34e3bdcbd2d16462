"""`iprm report`: one HTML file about one or several runs of `iprm fit`. Reads their folders alone, and loads no torch."""
