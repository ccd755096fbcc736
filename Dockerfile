# The image with docker or podman: docker build -t lighterman.dev/lighterman:0.1.0 .
# `make image` makes the same one, a static binary and certificate authorities, without a container engine.
FROM rust:1-bookworm AS build
# protoc for containerd's API; without recommended packages it would lack Google's well-known types.
RUN apt-get update && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev ca-certificates
WORKDIR /src
COPY . .
# --target even for the machine's own triple: without it the flags would be meant for build scripts and procedural macros too.
RUN triple="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --no-default-features --features agent --bin lighterman --target "$triple" \
    && install -D "target/$triple/release/lighterman" /out/lighterman

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/lighterman /lighterman
# `kubectl exec POD -- lighterman status` looks for the program there.
ENV PATH=/
# containerd's socket and content belong to root.
USER 0:0
ENTRYPOINT ["/lighterman"]
