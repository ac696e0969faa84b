package s3test_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, c storage.Config) objstore.Store {
	t.Helper()
	s, err := storage.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { objstore.Close(s) })
	return s
}

func put(t *testing.T, s objstore.Store, key, data string) {
	t.Helper()
	if _, err := s.Put(t.Context(), key, []byte(data), objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestServer(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{AccessLog: true})
	c := srv.Bucket("bucket")
	s := open(t, c)
	put(t, s, "a/b", "content")
	if data, err := os.ReadFile(filepath.Join(srv.Dir(), "bucket", "a", "b")); err != nil || string(data) != "content" {
		t.Errorf("%q, %v", data, err)
	}
	for _, end := range []func(){srv.Stop, srv.Kill} {
		end()
		if srv.PID() != 0 {
			t.Error("it still has a process")
		}
		if _, err := s.Stat(t.Context(), "a/b"); !errors.Is(err, objstore.ErrUnavailable) {
			t.Errorf("without a server: %v", err)
		}
		srv.Start()
		if srv.Bucket("bucket").Endpoint != c.Endpoint {
			t.Error("it is somewhere else now")
		}
		if data, _, err := s.Get(t.Context(), "a/b"); err != nil || string(data) != "content" {
			t.Errorf("after the restart: %q, %v", data, err)
		}
	}
	if r := srv.Requests(); r["PutObject"] != 1 || r["GetObject"] != 2 {
		t.Errorf("requests: %v", r)
	}
	srv.Pause()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Stat(ctx, "a/b"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while paused: %v", err)
	}
	srv.Resume()
	if _, err := s.Stat(t.Context(), "a/b"); err != nil {
		t.Errorf("after the pause: %v", err)
	}
}

func TestProxy(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	const delay = 25 * time.Millisecond
	p := srv.Proxy(delay)
	s := open(t, p.Config(srv.Bucket("bucket")))
	put(t, s, "k", "content")
	start := time.Now()
	if _, err := s.Stat(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 2*delay {
		t.Errorf("there and back in %v", d)
	}
	if n := p.Connections(); n != 1 {
		t.Errorf("%d connections: they are not used again", n)
	}
	// The delay is no limit to how much is under way: 16 MiB are 512 chunks.
	start = time.Now()
	put(t, s, "big", string(make([]byte, 16<<20)))
	if d := time.Since(start); d > 100*delay {
		t.Errorf("16 MiB in %v", d)
	}
	if sent, received := p.Bytes(); sent < 16<<20 || received == 0 {
		t.Errorf("%d bytes sent, %d received", sent, received)
	}

	p.Blackhole()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Stat(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("in a black hole: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.Stat(t.Context(), "k")
		done <- err
	}()
	p.Resume()
	if err := <-done; err != nil {
		t.Errorf("after the black hole: %v", err)
	}
	p.Cut()
	if _, err := s.Stat(t.Context(), "k"); !errors.Is(err, objstore.ErrUnavailable) {
		t.Errorf("when cut: %v", err)
	}
	p.Resume()
	if _, err := s.Stat(t.Context(), "k"); err != nil {
		t.Errorf("after the cut: %v", err)
	}
	p.Reset()
	if _, err := s.Stat(t.Context(), "k"); err != nil {
		t.Errorf("after a reset: %v", err)
	}
}
