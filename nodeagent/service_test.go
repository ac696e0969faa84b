package nodeagent

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// client of the node's own service, with gRPC's usual bounds.
func (m *machine) client() (nodev1.AgentServiceClient, func()) {
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return m.local.DialContext(ctx) }))
	if err != nil {
		m.t.Fatal(err)
	}
	return nodev1.NewAgentServiceClient(conn), func() { conn.Close() }
}

// writeLog makes the session's log; each line is one that a program wrote.
func (m *machine) writeLog(lines ...string) {
	var b strings.Builder
	for _, line := range lines {
		b.WriteString("2026-01-02T03:04:05.000000000Z stdout F " + line + "\n")
	}
	err := os.MkdirAll(m.logDir("s1"), 0o700)
	if err == nil {
		err = os.WriteFile(filepath.Join(m.logDir("s1"), "container.log"), []byte(b.String()), 0o600)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

func TestLogsOfAnyKind(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.apply([]*nodev1.Assignment{assigned(1, 1)}, nil)
		m.expectRunning(1, 1)
		long := strings.Repeat("x", 16<<10)
		lines := make([]string, 600) // far more than one message holds
		for i := range lines {
			lines[i] = long
		}
		lines[599] = "caf\xc3"
		m.writeLog(lines...)
		client, stop := m.client()
		defer stop()
		stream, err := client.ReadLogs(t.Context(), &nodev1.ReadLogsRequest{SessionId: "s1"})
		if err != nil {
			t.Fatal(err)
		}
		n, last := 0, ""
		for {
			resp, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("after %d lines: %v", n, err)
			}
			n += len(resp.GetEntries())
			last = resp.GetEntries()[len(resp.GetEntries())-1].GetLine()
		}
		if n != len(lines) || last != "caf\uFFFD" {
			t.Errorf("%d lines, the last is %q", n, last)
		}
	})
}

func TestFollowingEndsWithTheSession(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.apply([]*nodev1.Assignment{assigned(1, 1)}, nil)
		m.expectRunning(1, 1)
		m.writeLog("hello")
		client, stop := m.client()
		defer stop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		stream, err := client.ReadLogs(ctx, &nodev1.ReadLogsRequest{SessionId: "s1", Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		m.apply([]*nodev1.Assignment{assigned(2, 1)}, nil)
		m.expectRunning(2, 1)
		m.writeLog("hello", "of the next session")
		if resp, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

func TestNoEventsOfADeletedSession(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.apply([]*nodev1.Assignment{assigned(1, 1)}, nil)
		m.expectRunning(1, 1)
		gone := assigned(1, 1)
		gone.DesiredState = nodev1.Assignment_DELETE
		m.apply([]*nodev1.Assignment{gone}, nil)
		synctest.Wait() // the node does not know yet that the id is in use again
		client, stop := m.client()
		defer stop()
		stream, err := client.WatchEvents(t.Context(), &nodev1.WatchEventsRequest{SessionId: "s1", Generation: 1})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.NotFound {
			t.Errorf("events of a session that is gone: %v", err)
		}
	})
}
