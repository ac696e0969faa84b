package storage

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

// Every create looks at the folders of all sessions.
func BenchmarkInUse10000(b *testing.B) {
	s := openBench(b)
	var all []*fleet.Session
	for i := range 10_000 {
		sess := session(fmt.Sprintf("s%05d", i), "main", "root")
		sess.Spec.Env = map[string]string{"A": "1"}
		all = append(all, sess)
	}
	if _, err := s.Update(b.Context(), func(tx store.Tx) error {
		for _, sess := range all {
			if err := tx.PutSession(sess); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	free := session("another", "main", "root").Spec.Storage
	for b.Loop() {
		if err := s.View(b.Context(), func(tx store.ReadTx) error { return InUse(tx, free) }); err != nil {
			b.Fatal(err)
		}
	}
}

func openBench(b *testing.B) store.Store {
	b.Helper()
	s, err := boltstore.Open(filepath.Join(b.TempDir(), "fleet.db"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	return s
}
