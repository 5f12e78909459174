"""One colour for a site in every figure, all readable for the colour-blind."""

SITES = {
    "Kelder Point": "#0072b2",
    "Mirrow Bay": "#e69f00",
    "Saltholm": "#009e73",
    "Long Jetty": "#cc79a7",
}
