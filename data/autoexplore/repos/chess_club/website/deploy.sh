# Copy the website to the webspace
set -e
rsync -a public/ club:www/
