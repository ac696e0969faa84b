package boltstore

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/storetest"
)

// crashDir makes the test binary a writer that is there to be killed.
const crashDir = "CLOUDCODE_TEST_CRASH_DIR"

// crashChild writes from several goroutines, and says what was acknowledged, for
// ever.
func crashChild(dir string) {
	s, err := Open(filepath.Join(dir, "fleet.db"))
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for w := range 8 {
		go func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("p%d-w%d-%d", os.Getpid(), w, i)
				sess := storetest.NewSession(id)
				if _, err := s.Update(context.Background(), func(tx store.Tx) error {
					if err := tx.PutSession(sess); err != nil {
						return err
					}
					_, err := tx.AppendEvent(sess)
					return err
				}); err != nil {
					fmt.Println("error", err)
					os.Exit(1)
				}
				fmt.Println(id) // one write: a line arrives whole or not at all
			}
		}()
	}
	select {}
}

func TestKilledWriterLosesNothing(t *testing.T) {
	dir := t.TempDir()
	acknowledged := map[string]bool{}
	rounds := 15
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var kill *time.Timer
		n := 0
		for lines.Scan() {
			if len(lines.Text()) > 5 && lines.Text()[:5] == "error" {
				t.Errorf("writer: %s", lines.Text())
			}
			acknowledged[lines.Text()] = true
			if n++; n == 1 {
				// From the first acknowledgement on, at any moment.
				kill = time.AfterFunc(time.Duration(rand.IntN(40_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
			}
		}
		_ = cmd.Wait() // killed
		if kill == nil {
			t.Fatal("the writer ended without writing")
		}
		kill.Stop()

		s, err := Open(filepath.Join(dir, "fleet.db"))
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := s.View(t.Context(), func(tx store.ReadTx) error {
			for id := range acknowledged {
				sess, err := tx.Session(id)
				if err != nil {
					return fmt.Errorf("acknowledged, and lost: %w", err)
				}
				events := 0
				for _, err := range tx.Events(sess.UID, 0) {
					if err != nil {
						return err
					}
					events++
				}
				if events != 1 {
					return fmt.Errorf("%s has %d events: half a transaction", id, events)
				}
			}
			// What was not acknowledged may be there, but then whole, and counted.
			all := 0
			for _, err := range tx.Sessions("") {
				if err != nil {
					return err
				}
				all++
			}
			if all != int(tx.Revision()) {
				return fmt.Errorf("%d sessions at revision %d", all, tx.Revision())
			}
			return nil
		}); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		_ = s.db.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				t.Errorf("round %d: file is damaged: %v", round, err)
			}
			return nil
		})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d acknowledged writes in %d rounds", len(acknowledged), rounds)
}
