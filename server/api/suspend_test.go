package api

import (
	"testing"

	"google.golang.org/grpc/codes"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

func (f *fixture) stored(t *testing.T, id string) (s *fleet.Session, events int) {
	t.Helper()
	if err := f.store.View(t.Context(), func(tx store.ReadTx) (err error) {
		if s, err = tx.Session(id); err != nil {
			return err
		}
		for range tx.Events(s.UID, 0) {
			events++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return s, events
}

func TestSuspendResume(t *testing.T) {
	f := newFixture(t, nil)
	suspend := func(etag string) (*cloudcodev1.Session, error) {
		return f.SuspendSession(t.Context(), &cloudcodev1.SuspendSessionRequest{Name: "sessions/a", Etag: etag})
	}
	resume := func(etag string) (*cloudcodev1.Session, error) {
		return f.ResumeSession(t.Context(), &cloudcodev1.ResumeSessionRequest{Name: "sessions/a", Etag: etag})
	}
	_, err := suspend("")
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")

	made := f.create(t, "a", nil)
	f.edit(t, "a", place)
	_, err = suspend(made.GetEtag())
	wantErr(t, "old etag", err, codes.Aborted, "ETAG_MISMATCH")
	got, err := resume("")
	if err != nil || got.GetState() != cloudcodev1.Session_RUNNING {
		t.Errorf("resume what runs: %v, %v", got, err)
	}
	_, events := f.stored(t, "a")
	got, err = suspend("")
	if err != nil || got.GetState() != cloudcodev1.Session_SUSPENDING || got.GetNode() != "nodes/n1" {
		t.Errorf("suspend: %v, %v", got, err)
	}
	again, err := suspend("")
	if err != nil || again.GetEtag() != got.GetEtag() {
		t.Errorf("suspended twice: %v, %v", again, err)
	}
	if s, n := f.stored(t, "a"); !s.Suspended || n != events+1 {
		t.Errorf("stored %+v with %d events", s, n)
	}
	got, err = resume(got.GetEtag())
	if err != nil || got.GetState() != cloudcodev1.Session_STARTING {
		t.Errorf("resume: %v, %v", got, err)
	}

	f.edit(t, "a", func(s *fleet.Session) { s.State = fleet.StateLost })
	_, err = suspend("")
	wantErr(t, "suspend what is lost", err, codes.FailedPrecondition, "SESSION_LOST")
	_, err = resume("")
	wantErr(t, "resume what is only there", err, codes.FailedPrecondition, "SESSION_LOST")
	f.edit(t, "a", func(s *fleet.Session) { s.Spec.Storage.Mode = fleet.ModeSnapshot })
	got, err = resume("")
	if err != nil || got.GetState() != cloudcodev1.Session_PENDING || got.GetNode() != "" || got.GetGeneration() != 1 {
		t.Errorf("resume what is in object storage: %v, %v", got, err)
	}
	if _, err := f.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/a"}); err != nil {
		t.Fatal(err)
	}
	_, err = suspend("")
	wantErr(t, "suspend what is deleted", err, codes.FailedPrecondition, "SESSION_DELETING")
	_, err = resume("")
	wantErr(t, "resume what is deleted", err, codes.FailedPrecondition, "SESSION_DELETING")
	if resp, err := f.ListSessions(t.Context(), &cloudcodev1.ListSessionsRequest{Filter: "state = SUSPENDED"}); err != nil || len(resp.GetSessions()) != 0 {
		t.Errorf("filter: %v, %v", resp, err)
	}
}
