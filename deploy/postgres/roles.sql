-- The two roles of the service, for psql as a superuser in its database: the one that migrates and owns the
-- schema, and the one that the processes connect as. The image of PostgreSQL runs it once, on an empty volume;
-- by hand: psql -v owner_password=... -v app_password=... -f roles.sql positions
-- What the second one may do, `positions migrate` says, with POSITION_MANAGER_DATABASE_ROLE=positions.
\set ON_ERROR_STOP on
\if :{?owner_password}
\else
\set owner_password `cat /run/secrets/postgres_owner_password`
\set app_password `cat /run/secrets/postgres_password`
\endif
CREATE ROLE positions LOGIN PASSWORD :'app_password';
-- A member, so that it can alter the snapshots, whose partitions the other one makes.
CREATE ROLE positions_owner LOGIN PASSWORD :'owner_password' IN ROLE positions;
ALTER DATABASE :"DBNAME" OWNER TO positions_owner;
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO positions;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
