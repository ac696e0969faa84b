package storage

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

// TestRealWords asks a real S3 server for what users get wrong.
func TestRealWords(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{Region: "eu-test-1"})
	good := srv.Bucket("bucket")
	good.Region = ""
	away := srv.Proxy(0)
	away.Cut()
	silent := srv.Proxy(0)
	silent.Blackhole()
	with := func(change func(*conf.Config)) conf.Config {
		c := good
		change(&c)
		return c
	}
	all := map[string]conf.Config{
		"default":  good,
		"secret":   with(func(c *conf.Config) { c.SecretAccessKey = "hunter2" }),
		"id":       with(func(c *conf.Config) { c.AccessKeyID = "nobody" }),
		"nobucket": with(func(c *conf.Config) { c.Bucket = "nosuch" }),
		"region":   with(func(c *conf.Config) { c.Region = "us-west-9" }),
		"away":     away.Config(good),
		"silent":   silent.Config(good),
	}
	profiles, err := conf.NewProfiles(nil, all)
	if err != nil {
		t.Fatal(err)
	}
	db, err := boltstore.Open(filepath.Join(t.TempDir(), "fleet.db"))
	if err != nil {
		t.Fatal(err)
	}
	s := New(Config{Store: db, Profiles: profiles, Own: conf.OwnAny, Logger: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { // after the parallel parts
		_ = s.Close()
		_ = db.Close()
	})

	got, err := s.Resolve(t.Context(), "id", protoconv.StorageRequest{})
	if err != nil || got.Storage.Mode != fleet.ModeSnapshot || got.Storage.Region != "eu-test-1" {
		t.Errorf("right: %+v, %v", got, err)
	}
	// The same store, brought by a session to a server that takes public ones only.
	strict := New(Config{Store: db, Logger: slog.New(slog.DiscardHandler)})
	defer strict.Close()
	_, err = strict.Resolve(t.Context(), "id", protoconv.StorageRequest{S3: &fleet.S3{
		Endpoint: good.Endpoint, Bucket: good.Bucket, AccessKeyID: good.AccessKeyID, SecretAccessKey: good.SecretAccessKey, PathStyle: true,
	}})
	wantErr(t, "own", err, codes.InvalidArgument, ReasonNotAllowed, "session.spec.storage.s3", "127.0.0.1", "--own-storage=any")
	for name, c := range map[string]struct {
		code   codes.Code
		reason string
		says   string
	}{
		"secret":   {codes.FailedPrecondition, ReasonDenied, "s3://bucket"},
		"id":       {codes.FailedPrecondition, ReasonDenied, "s3://bucket"},
		"nobucket": {codes.FailedPrecondition, ReasonNoBucket, "nosuch"},
		"region":   {codes.FailedPrecondition, ReasonWrongRegion, "eu-test-1"},
		"away":     {codes.Unavailable, ReasonUnreachable, "s3://bucket"},
		"silent":   {codes.Unavailable, ReasonUnreachable, "s3://bucket"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			_, err := s.Resolve(t.Context(), "id", protoconv.StorageRequest{Profile: name})
			wantErr(t, name, err, c.code, c.reason, c.says)
			t.Logf("after %v: %v", time.Since(start).Round(time.Millisecond), err)
			if took := time.Since(start); took > checkBound+10*time.Second {
				t.Errorf("took %v", took)
			}
			if name == "silent" {
				return // the same once more, for as long
			}
			own := all[name]
			_, err = s.Resolve(t.Context(), "id", protoconv.StorageRequest{S3: &fleet.S3{
				Endpoint: own.Endpoint, Bucket: own.Bucket, AccessKeyID: own.AccessKeyID, SecretAccessKey: own.SecretAccessKey,
				Region: own.Region, PathStyle: own.PathStyle,
			}})
			code := c.code
			if code == codes.FailedPrecondition {
				code = codes.InvalidArgument
			}
			wantErr(t, name+", own", err, code, c.reason, c.says)
		})
	}
}
