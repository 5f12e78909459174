# Copy the patient software to tape at midnight
tar czf /backup/patients.tgz /srv/patients
