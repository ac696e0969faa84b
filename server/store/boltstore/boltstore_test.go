package boltstore

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/storetest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashChild(dir)
	}
	goleak.VerifyTestMain(m)
}

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T, dir string) store.Store {
		s, err := Open(filepath.Join(dir, "fleet.db"))
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestFileMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fleet.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
}

func TestSecondServerIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fleet.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := Open(path); !errors.Is(err, fleet.ErrUnavailable) || !strings.Contains(err.Error(), "another cloudcode server") {
		t.Fatalf("second open: %v", err)
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fleet.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keySchema, []byte("2")) }); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(path)
	if _, err := Open(path); !errors.Is(err, fleet.ErrFailedPrecondition) || !strings.Contains(err.Error(), "newer cloudcode") {
		t.Fatalf("open: %v", err)
	}
	if after, _ := os.ReadFile(path); string(before) != string(after) {
		t.Error("the refused file was changed")
	}
}

// TestDiskFull fills a file system of 2 MiB. What fails must leave no trace, what
// was acknowledged must stay, and with room again writing must go on.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatalf("mount tmpfs: %v", err)
		}
		t.Skipf("needs root to mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "fleet.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	var stored []string
	for i := 0; ; i++ {
		sess := storetest.NewSession("s" + strings.Repeat("x", i%7) + string(rune('a'+i%26)) + strings.Repeat("y", i/26))
		sess.Message = strings.Repeat("m", 20_000)
		_, err := s.Update(t.Context(), func(tx store.Tx) error { return tx.PutSession(sess) })
		if err == nil {
			stored = append(stored, sess.ID)
			if i > 1000 {
				t.Fatal("2 MiB hold 20 MB")
			}
			continue
		}
		if !errors.Is(err, fleet.ErrResourceExhausted) {
			t.Fatalf("after %d sessions: %v", i, err)
		}
		break
	}
	if len(stored) < 10 {
		t.Fatalf("only %d sessions before it was full", len(stored))
	}
	check := func() {
		t.Helper()
		var got []string
		if err := s.View(t.Context(), func(tx store.ReadTx) error {
			if int(tx.Revision()) != len(stored) {
				t.Errorf("revision %d, stored %d", tx.Revision(), len(stored))
			}
			for _, id := range stored {
				if _, err := tx.Session(id); err != nil {
					return err
				}
			}
			for sess, err := range tx.Sessions("") {
				if err != nil {
					return err
				}
				got = append(got, sess.ID)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if len(got) != len(stored) {
			t.Errorf("%d sessions are there, %d were acknowledged", len(got), len(stored))
		}
		if err := s.db.View(func(tx *bbolt.Tx) error {
			var errs []error
			for err := range tx.Check() {
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		}); err != nil {
			t.Errorf("file is damaged: %v", err)
		}
	}
	check()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), func(tx store.Tx) error { return tx.PutSession(storetest.NewSession("zz")) }); err != nil {
		t.Fatalf("with room again: %v", err)
	}
	stored = append(stored, "zz")
	check()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(path); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check()
}

func TestLargeEventsAreFewer(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "fleet.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sess := storetest.NewSession("a")
	sess.Spec.OpenCodeConfig = strings.Repeat("x", 1<<20)
	for range 20 {
		if _, err := s.Update(t.Context(), func(tx store.Tx) error { _, err := tx.AppendEvent(sess); return err }); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	_ = s.View(t.Context(), func(tx store.ReadTx) error {
		for range tx.Events(sess.UID, 0) {
			n++
		}
		return nil
	})
	if n == 0 || n > 8 {
		t.Errorf("%d events of 1 MiB are kept", n)
	}
}

func benchmark(b *testing.B, parallel int) {
	s, err := Open(filepath.Join(b.TempDir(), "fleet.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	b.SetParallelism(parallel)
	b.RunParallel(func(pb *testing.PB) {
		sess := storetest.NewSession("a")
		for pb.Next() {
			if _, err := s.Update(context.Background(), func(tx store.Tx) error { return tx.PutSession(sess.Clone()) }); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkUpdate64(b *testing.B) { benchmark(b, 32) } // times GOMAXPROCS

func BenchmarkUpdateAlone(b *testing.B) {
	s, err := Open(filepath.Join(b.TempDir(), "fleet.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		if _, err := s.Update(context.Background(), func(tx store.Tx) error { return tx.PutSession(storetest.NewSession("a")) }); err != nil {
			b.Fatal(err)
		}
	}
}
