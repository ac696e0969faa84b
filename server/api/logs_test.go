package api

import (
	"errors"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestReadLogs(t *testing.T) {
	agent := &fakeAgent{lines: []string{"one", "two", "three"}, err: io.EOF}
	f := newFixture(t, func(c *Config) { c.Agents = agent })
	read := func(tail int32) (lines []string, err error) {
		stream, err := f.ReadSessionLogs(t.Context(), &cloudcodev1.ReadSessionLogsRequest{Name: "sessions/a", TailLines: tail})
		if err != nil {
			return nil, err
		}
		for {
			entry, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return lines, nil
			} else if err != nil {
				return lines, err
			}
			lines = append(lines, entry.GetLine())
		}
	}
	_, err := read(0)
	wantErr(t, "unknown", err, codes.NotFound, "SESSION_NOT_FOUND")
	f.create(t, "a", nil)
	_, err = read(0)
	wantErr(t, "not placed", err, codes.FailedPrecondition, "SESSION_NOT_PLACED")
	_, err = read(-1)
	wantErr(t, "negative", err, codes.InvalidArgument, "INVALID_FIELDS")
	f.edit(t, "a", place)
	if lines, err := read(0); err != nil || !slices.Equal(lines, agent.lines) {
		t.Errorf("%q, %v", lines, err)
	}
	if lines, err := read(1); err != nil || !slices.Equal(lines, agent.lines[2:]) {
		t.Errorf("%q, %v", lines, err)
	}
	agent.err = status.Error(codes.NotFound, "no such session here")
	_, err = read(0)
	wantErr(t, "not started", err, codes.FailedPrecondition, "SESSION_NOT_STARTED")
	agent.err = status.Error(codes.Unavailable, "link down")
	_, err = read(0)
	wantErr(t, "link down", err, codes.Unavailable, "NODE_UNREACHABLE")
	f.edit(t, "a", func(s *fleet.Session) { s.Assignment.Node = "n2" })
	_, err = read(0)
	wantErr(t, "no link", err, codes.Unavailable, "UNAVAILABLE")
}

func TestErrorClasses(t *testing.T) {
	for _, c := range classes {
		err := Status(t.Context(), nil, errors.Join(errors.New("outer"), c.err))
		wantErr(t, c.reason, err, c.code, c.reason)
	}
}
