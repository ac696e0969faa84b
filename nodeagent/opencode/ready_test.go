package opencode

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestWaitReady: OpenCode refuses connections at first, then takes requests that
// it never answers, and then is ready. The first answer comes at the first probe
// after that, whatever hangs from before.
func TestWaitReady(t *testing.T) {
	const bound, ready = 200 * time.Millisecond, 330 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var hung atomic.Int32
		c := NewClient(func(context.Context) (net.Conn, error) {
			if time.Since(start) < bound {
				return nil, syscall.ECONNREFUSED
			}
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				r := bufio.NewReader(server)
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				if time.Since(start) < ready {
					hung.Add(1)
					_, _ = r.ReadByte() // until the client gives up
					return
				}
				const body = `{"healthy":true,"version":"1.2.3"}`
				_, _ = server.Write([]byte("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n\r\n" + body))
			}()
			return client, nil
		}, "secret")
		version, err := c.WaitReady(t.Context())
		took := time.Since(start)
		if err != nil || version != "1.2.3" {
			t.Fatalf("%q, %v", version, err)
		}
		if took >= ready+probeInterval+time.Millisecond {
			t.Errorf("ready after %v, noticed after %v", ready, took)
		}
		c.Close()
		synctest.Wait()
		if hung.Load() == 0 {
			t.Error("no probe hung: this test has shown nothing")
		}
	})
}

func TestWaitReadyGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewClient(func(context.Context) (net.Conn, error) { return nil, syscall.ECONNREFUSED }, "secret")
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
		defer cancel()
		_, err := c.WaitReady(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connection refused") {
			t.Fatal(err)
		}
	})
}
