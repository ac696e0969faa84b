package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/cloudcode-dev/cloudcode/cmd/cloudcode/internal/cli"
	"github.com/cloudcode-dev/cloudcode/image"
	"github.com/cloudcode-dev/cloudcode/nodeagent"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// upTeardown bounds how long Ctrl-C takes; a session's end is bounded by itself.
const upTeardown = 2 * time.Minute

// sessionTimeout bounds how long the first session is waited for.
const sessionTimeout = 5 * time.Minute

func newUpCmd() *cobra.Command {
	u := &up{}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run everything on this machine: server, gateway and node daemon in one process",
		Long: `Run a whole fleet of one machine in one process, as root: server, gateway, node
daemon and a private containerd. It builds the default image if this machine
lacks it, creates a session if there is none, and says what to open.

Ctrl-C ends it all: containers, mounts, network and containerd. Sessions and
their files stay, and run again at the next start.

` + storageHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return u.run(cmd) },
	}
	u.server.add(cmd)
	u.gateway.add(cmd)
	u.node.add(cmd)
	cmd.Flags().StringVar(&u.session, "session", "main", "session that is created if it does not exist; empty: none")
	cmd.Flags().StringSliceVar(&u.mirrors, "mirror", nil, "Debian mirror for building the image, as mmdebstrap takes it; can be repeated")
	cmd.Flags().StringVar(&u.cloudflared, "with-cloudflared", "", "cloudflared for the image: the program, a folder that holds it, or an address to download it from")
	return cmd
}

type up struct {
	server      serverFlags
	gateway     gatewayFlags
	node        nodeFlags
	session     string
	mirrors     []string
	cloudflared string

	out io.Writer
}

func (u *up) say(format string, args ...any) { fmt.Fprintf(u.out, "==> "+format+"\n", args...) }

func (u *up) run(cmd *cobra.Command) (err error) {
	ctx := cmd.Context()
	u.out = cmd.OutOrStdout()
	if os.Geteuid() != 0 {
		return errors.New("cloudcode up runs containers and needs root: run it with sudo")
	}
	dataDir, err := absDataDir(cmd)
	if err != nil {
		return err
	}
	log := cli.Logger(cmd, slog.LevelWarn)

	u.say("starting server, data in %s", dataDir)
	srv, err := u.server.start(ctx, dataDir, u.gateway.allowAnonymous, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopBounded(ctx, srv.Stop)) }()
	token := joinToken(cmd, dataDir)

	u.say("starting gateway")
	gw, stopGateway, err := u.gateway.start(ctx, dataDir, srv.Addr().String(), token, localTokens(dataDir), log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopBounded(ctx, stopGateway)) }()

	u.say("starting node daemon and containerd")
	cfg, err := u.node.config(dataDir, srv.Addr().String(), token, log)
	if err != nil {
		return err
	}
	cfg.Ephemeral = true
	if u.server.defaultImage == image.DefaultRef {
		// Before the daemon looks after sessions: they need it.
		cfg.Prepare = func(ctx context.Context, r runtime.Runtime) error { return u.ensureImage(ctx, dataDir, r) }
	}
	agent, err := nodeagent.New(cfg)
	if err != nil {
		return err
	}
	if err := agent.Start(ctx); err != nil {
		return interruptedIsFine(ctx, err)
	}
	defer func() {
		u.say("ending: containers, network and containerd go, sessions' files stay")
		tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), upTeardown)
		defer cancel()
		err = errors.Join(err, agent.Teardown(tctx, func(what string) { u.say("%s", what) }))
	}()

	if line := cli.StorageLine(cmd); line != "" {
		u.say("%s", line)
	}
	if err := u.ensureSession(cmd); errors.Is(err, cli.ErrNoSession) {
		u.session = ""
	} else if err != nil {
		return interruptedIsFine(ctx, err)
	}
	u.awaitAnswer(ctx, dataDir, gw.Addr())
	if ctx.Err() == nil {
		if err := u.print(dataDir, srv.Addr().String(), gw.BaseURI()); err != nil {
			return err
		}
	}
	return waitFor(ctx, srv.Wait, gw.Wait)
}

func interruptedIsFine(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// ensureImage builds the default image (which is quick when nothing changed) and
// imports it unless containerd has it.
func (u *up) ensureImage(ctx context.Context, dataDir string, r runtime.Runtime) error {
	u.say("preparing the session image %s", image.DefaultRef)
	result, err := image.Build(ctx, image.BuildOptions{
		CacheDir: filepath.Join(dataDir, "image"), Mirrors: u.mirrors, Cloudflared: u.cloudflared,
		Progress: func(p image.Progress) {
			if strings.HasPrefix(p.Line, "npm ") {
				return // a line for each of a hundred packages
			}
			fmt.Fprintf(u.out, "    %5.0fs  %-8s %s\n", p.Elapsed.Seconds(), p.Phase, p.Line)
		},
	})
	if err != nil {
		return fmt.Errorf("build the session image: %w", err)
	}
	for _, left := range result.LeftOut {
		fmt.Fprintf(u.out, "            left out %s\n", left)
	}
	have, err := r.Images(ctx)
	if err != nil {
		return err
	}
	for _, i := range have {
		if i.Name == result.Ref && i.Digest == result.Digest {
			return nil
		}
	}
	u.say("importing the image, %s", units.HumanSize(float64(result.Size)))
	f, err := os.Open(result.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = r.ImportImage(ctx, f, result.Ref, nil)
	return err
}

// ensureSession creates the session if it does not exist, and shows how it starts.
func (u *up) ensureSession(cmd *cobra.Command) error {
	if u.session == "" {
		return nil
	}
	u.say("starting session %s", u.session)
	return cli.EnsureSession(cmd, u.session, sessionTimeout)
}

// awaitAnswer returns once the session's OpenCode answers through the gateway, or
// is known not to. After a restart the server has what it knew last: that a
// session runs is true only when it answers.
func (u *up) awaitAnswer(ctx context.Context, dataDir, gateway string) {
	if u.session == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	host, port, err := net.SplitHostPort(gateway)
	if err != nil {
		return
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/v1/sessions/"+u.session+"/proxy/global/health", nil)
	if err != nil {
		return
	}
	for _, token := range localTokens(dataDir) {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		resp, err := client.Do(req)
		if err != nil {
			return
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		_ = resp.Body.Close()
		starting := resp.StatusCode == http.StatusBadGateway ||
			resp.StatusCode == http.StatusServiceUnavailable && bytes.Contains(body, []byte(`"state":"STARTING"`))
		if !starting {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

// print says what to open and what to paste.
func (u *up) print(dataDir, grpc, baseURI string) error {
	base, err := url.Parse(baseURI)
	if err != nil {
		return err
	}
	username, password := credentialsFromEnv()
	curlAuth, attachAuth, grpcAuth := "", "", ""
	if password != "" {
		curlAuth = fmt.Sprintf(` -u "%s:$SERVER_PASSWORD"`, username)
		attachAuth = fmt.Sprintf(` -u "%s" -p "$SERVER_PASSWORD"`, username)
		grpcAuth = fmt.Sprintf(` -H "authorization: Bearer $(cat %s)"`, filepath.Join(dataDir, "server", "token"))
	}
	fmt.Fprintf(u.out, "\nCloud Code is running.\n\n  dashboard   %s/\n", base)
	if u.session != "" {
		web := *base
		web.Host = u.session + "." + base.Host
		fmt.Fprintf(u.out, "  session     %s/\n\n", &web)
		fmt.Fprintf(u.out, "  curl%s %s/v1/sessions/%s\n", curlAuth, base, u.session)
		fmt.Fprintf(u.out, "  grpcurl -cacert %s%s -d '{\"name\":\"sessions/%s\"}' %s cloudcode.v1.SessionService/GetSession\n",
			filepath.Join(dataDir, "pki", "ca.crt"), grpcAuth, u.session, grpc)
		// By path: not every machine's resolver knows names below localhost, as
		// browsers and curl do.
		fmt.Fprintf(u.out, "  opencode attach %s/v1/sessions/%s/proxy%s\n", base, u.session, attachAuth)
	}
	_, err = fmt.Fprintf(u.out, "\nCtrl-C ends it. Another terminal: cloudcode session list\n")
	return err
}
